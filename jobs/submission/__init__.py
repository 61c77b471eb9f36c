"""Parts of `beit submit`: what is sent, to which cluster, and how its log is followed."""
