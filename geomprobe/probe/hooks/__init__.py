"""The hooks into torch: optimizer steps, backward passes, module calls, scalers and clipping."""
