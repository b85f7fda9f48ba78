"""OpenAI's wire formats: request bodies, responses, events, errors, the OpenAPI document."""
