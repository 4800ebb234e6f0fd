"""Many runs on one frozen base, in the passes of one engine."""
