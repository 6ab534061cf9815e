"""Between the router's policy and SGLang's processes: dispatch, completion reports, restarts."""
