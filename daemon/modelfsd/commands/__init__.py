"""What people see: the commands, the admin socket and what both show."""
