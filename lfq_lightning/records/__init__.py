"""What quantizers looked like: tables, trajectories and pictures."""
