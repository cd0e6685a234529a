"""Evaluation of trained models: tests on labels, retrieval, features."""
