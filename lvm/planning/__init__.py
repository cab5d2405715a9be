"""What a run will need and take, by arithmetic: memory, mesh, time. `lvm.plan` is the command."""
