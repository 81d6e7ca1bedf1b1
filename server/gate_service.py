"""Measuring a candidate on the certification service, which may be another machine's; see `certify.service`.

The answer is checked: metrics of other data or settings, or a decision that this process would not make on them, refuse
the candidate. What the metrics say is believed, so the service is as trusted as the server itself.
"""

from pathlib import Path

from certify.gate import GateMetrics, GateState, Policy, decide
from certify.network import Network
from certify.service import auth
from certify.service.client import CertifyClient, ServiceError
from certify.service.measure import GateSettings, Labelled
from tasks.config import RunConfig
from tasks.errors import CertificationError, ConfigError, HawthornError

AWAY = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED")
FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles up to 20


class UnreachableError(HawthornError):
    """Nobody answered, or not in time: nothing is known of the candidate."""


class RemoteMeasure:
    """Asks a service; a new connection each round, so that none has to outlive hours of training."""

    def __init__(
        self, config: RunConfig, settings: GateSettings, validation: Labelled, certification: Labelled, policy: Policy
    ) -> None:
        self.config, self.settings, self.policy = config, settings, policy
        self.validation, self.certification = validation, certification
        self.protocol = settings.protocol(validation, certification)
        connect(config).close()  # what is wrong with keys and certificates is said before the run

    def __call__(self, network: Network, state: GateState) -> GateMetrics:
        """Return the metrics; raises `UnreachableError`, or `CertificationError` for an answer not to be believed."""
        where = self.config.gate_service
        options = {name: value for name, value in vars(self.policy).items() if name != "name"}
        try:
            with connect(self.config) as client:
                answer = client.gate(
                    network, self.validation, self.certification, self.settings,
                    state=state, policy=self.policy.name, options=options,
                )  # fmt: skip
        except ServiceError as error:
            if error.code in AWAY:
                raise UnreachableError(f"{where}: {error}") from None
            raise
        if answer.metrics.protocol != self.protocol:
            raise CertificationError(f"{where} measured with other data or settings than asked")
        if [bound.eps for bound in answer.metrics.bounds] != list(self.settings.eps):
            raise CertificationError(f"{where} measured other radii than asked")
        if answer.accepted != decide(answer.metrics, state, self.policy).accepted:
            raise CertificationError(f"{where} decided differently on its own metrics")
        return answer.metrics


def connect(config: RunConfig) -> CertifyClient:
    """Return a client of the run's service; nothing goes over the network yet. Raises `ConfigError`."""
    paths = [config.gate_tls_ca, config.gate_tls_cert, config.gate_tls_key]
    ca, cert, key = (Path(path).expanduser() if path else None for path in paths)
    return CertifyClient(
        config.gate_service, token=read_token(config.gate_token_file), tls=config.gate_tls, tls_ca=ca, tls_cert=cert,
        tls_key=key, timeout=config.gate_timeout, attempts=config.gate_attempts, first_pause=FIRST_PAUSE,
    )  # fmt: skip


def read_token(path: str) -> str | None:
    """Return the token in a file, None without one; raises `ConfigError`."""
    if not path:
        return None
    try:
        return auth.check_token(Path(path).expanduser().read_text().strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is no text" if isinstance(error, ValueError) else error.strerror
        raise ConfigError(f"cannot read gate-token-file {path}: {reason}") from None
