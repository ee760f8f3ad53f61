"""Where weights live when they are not on the device: host memory or a disk."""
