"""Flow matching (Waver §2.2, §4.3, §4.5): timesteps, objectives, guidance, the Euler sampler and the refiner's degradations.

One convention throughout, SD3's: `x_t = (1 - t) x_0 + t n`, t in [0, 1] and in fp32, t = 1 is noise, and the network predicts
the velocity `dx/dt = n - x_0`. The refiner goes from a degraded latent to a clean one with the opposite sign, as the report
writes it: input `w x_n + (1 - w) x_0`, target `x_0 - x_n`. Nothing here knows the network, and nothing draws from torch's
global generator.
"""
