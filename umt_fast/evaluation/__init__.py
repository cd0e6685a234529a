"""What a trained model is worth: tests on labels, retrieval, features."""
