"""Where bytes lie: disks and buckets, folders written whole, the hub, files of tensors and JSON."""
