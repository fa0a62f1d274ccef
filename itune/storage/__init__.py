"""What lies outside this machine's folders: objects in buckets, and the cache that they are fetched into."""
