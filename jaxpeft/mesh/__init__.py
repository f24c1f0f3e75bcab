"""Which device holds what: the layout of arrays on a mesh, and the processes of one run."""
