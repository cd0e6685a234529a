"""Time of every op of umt_kernels against its published eager form, torch.compile and other libraries' kernels."""
