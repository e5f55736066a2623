"""One module a file format; each turns tensors into layers by diffusers module path, and back."""
