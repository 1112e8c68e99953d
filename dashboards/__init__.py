"""How a study is seen: pictures of its front."""
