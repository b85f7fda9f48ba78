"""What can be set: the application, its models, the settings file and Ray Serve's config."""
