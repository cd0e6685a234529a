"""What every training loop needs around it."""
