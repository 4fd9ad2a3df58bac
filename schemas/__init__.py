"""What crosses a boundary: the run config, Arrow schemas, SQL, the viewer's JSON and the errors."""
