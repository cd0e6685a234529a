"""The loss of each job, one file each."""
