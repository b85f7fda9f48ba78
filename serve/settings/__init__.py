"""Settings: of the application and its models, the settings file, and Ray Serve's config."""
