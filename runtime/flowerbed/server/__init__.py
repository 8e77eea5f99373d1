"""What runs on the coordinator: the lab as a Grid, its record, and what serves that record."""
