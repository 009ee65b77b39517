"""The type of --guidance_interval, which `sample` and `evaluate` share."""

from dataclasses import dataclass

from tiny_diffusion.config.option import Type


@dataclass(frozen=True)
class Interval(Type):
    """Two times LOW,HIGH with 0 <= LOW < HIGH <= 1."""

    metavar = "LOW,HIGH"

    def parse(self, text):
        try:
            low, high = map(float, text.split(","))
        except ValueError:
            raise ValueError(f"{text!r} is not two times such as 0.2,0.8") from None
        return low, high

    def check(self, value):
        low, high = value
        if not (0 <= low <= 1 and 0 <= high <= 1):
            return f"{self.show(value)} leaves the range of time, from 0 (clean) to 1 (pure noise). Try 0.2,0.8"
        if low >= high:
            kind = "empty" if low == high else "reversed"
            return f"{self.show(value)} is {kind}; the first time must be less than the second. Try 0.2,0.8"
        return None

    def show(self, value):
        return ",".join(f"{end:g}" for end in value)
