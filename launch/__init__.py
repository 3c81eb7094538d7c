"""The programs, and how their ranks are started and find one another; imported by no other wing."""
