"""What became of one trial: result.json, typed."""


def print_summary(result):
    """Print a result the way that scripts of karpathy/autoresearch expect it, one `name: value` a line."""
    print("---")
    if result["outcome"] != "ok":
        print(f"outcome:          {result['outcome']}\nreason:           {result['reason']}")
    for name, key, scale, form in (
        ("val_bpb", "val_bpb", 1, ".6f"),
        ("training_seconds", "training_seconds", 1, ".1f"),
        ("startup_seconds", "startup_seconds", 1, ".1f"),
        ("eval_seconds", "eval_seconds", 1, ".1f"),
        ("total_seconds", "total_seconds", 1, ".1f"),
        ("peak_vram_mb", "peak_vram_mb", 1, ".1f"),
        ("peak_rss_mb", "peak_rss_mb", 1, ".1f"),
        ("total_tokens_M", "tokens", 1e-6, ".1f"),
        ("num_steps", "steps", 1, ".0f"),
        ("num_params_M", "params", 1e-6, ".1f"),
    ):
        if key in result:
            print(f"{name + ':':<18}{result[key] * scale:{form}}")
