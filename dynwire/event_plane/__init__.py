"""How KV cache events travel from workers to routers, and how what was lost on the way is found again."""
