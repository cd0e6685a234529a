"""Aliases of three functions of `umt_fast.weights`, for code that imports them from here."""

from umt_fast.weights import load_clip_teacher, load_umt_student, umt_state_dict

__all__ = ["load_clip_teacher", "load_umt_student", "umt_state_dict"]
