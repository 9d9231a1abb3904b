"""Jump coefficients f, g and inner scaling c_skip, c_out, c_in, c_noise, as values (math.md §2)."""

# Stored settings name a class among those defined: whoever reads them has imported all there are.
from fewstep.flow.preconditioning import analytic as analytic
from fewstep.flow.preconditioning import jumps as jumps
from fewstep.flow.preconditioning import skip as skip
