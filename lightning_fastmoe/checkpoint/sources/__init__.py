"""What can be loaded from: this package's directories, single files, and DeepSpeed's own."""
