"""What runs a schedule: streams, events and the tasks on them."""
