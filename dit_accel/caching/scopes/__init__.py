"""Which parts of a model a cache may skip: blocks, single modules, the inside of a UNet, a branch, the whole call."""
