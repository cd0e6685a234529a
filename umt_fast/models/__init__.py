"""The student and the teacher."""
