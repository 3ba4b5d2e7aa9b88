"""The speed of every op and of whole steps, beside what a user has without this package."""
