"""Ray on this machine: how it is started or joined, its scratch files, and the processes it starts."""
