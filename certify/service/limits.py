"""What one service allows; numbers beyond it are refused before anything is allocated."""

from dataclasses import dataclass, fields

from tasks.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes and counts; all of them whole numbers from 1 but the seconds."""

    queue_size: int = 32
    workers: int = 1
    max_model_bytes: int = 2**30
    max_set_bytes: int = 2**30
    max_store_bytes: int = 20 * 2**30  # of models and sets
    max_result_bytes: int = 5 * 2**30  # of results and saved progress
    max_uploads: int = 8  # of one caller (address) at a time
    max_points: int = 100_000
    max_draws: int = 1_000_000
    max_radii: int = 16
    max_attack_steps: int = 1000
    max_operations: int = 10**17  # multiplications of one request, estimated from above
    max_batch_bytes: int = 8 * 2**30  # numbers of one batch between the layers of its model
    memory_bytes: int | None = None  # of a certifier's working set on the device; None: its own default
    idle_seconds: float = 60.0  # between two messages of an upload, or for a client to take one of an answer
    save_seconds: float = 5.0  # between two saves of progress

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "memory_bytes":
                continue
            kinds = (int, float) if field.type is float else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= 2**62:
                wanted = "a number of seconds above 0" if field.type is float else "a whole number from 1"
                raise ConfigError(f"{field.name} must be {wanted}, got {value!r}")

        if self.memory_bytes is not None and self.memory_bytes < 2**20:
            raise ConfigError(f"memory_bytes must be at least {2**20}, or None, got {self.memory_bytes}")

    @property
    def max_streams(self) -> int:
        """Requests with work or an upload that may be answered at a time, those that wait included."""
        return 2 * (self.queue_size + self.workers) + 16
