"""What happens to a gradient?"""
