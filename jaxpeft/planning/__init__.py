"""What a run will be, before a weight is loaded or a machine is rented."""
