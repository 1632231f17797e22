"""The Triton and PyTorch parts as a package that Hugging Face's library `kernels` loads; `python -m kernel_hub`."""
