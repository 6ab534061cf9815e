"""What every process of a server needs: how it lives, listens, forks and ends."""
