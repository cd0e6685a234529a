"""Everything that a training loop needs besides the model, the loss and the data."""
