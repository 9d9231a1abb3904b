"""The mathematics: paths, times, preconditionings, flow maps, derivatives, guidance, ODEs, closed-form cases."""
