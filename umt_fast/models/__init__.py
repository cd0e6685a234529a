"""The models: video ViT and its heads, CLIP teacher, text encoder, pixel autoencoders, and their parts."""
