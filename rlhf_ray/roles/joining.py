"""Joining a Ray cluster that runs already: its token is shown, and where nobody answers that is said in seconds."""

import logging
import socket
import subprocess
import sys

from rlhf_ray.errors import InfrastructureError

CONNECT_S = 30


def use_token() -> None:
    """Lets this process show the token that lies ready; Ray by itself does so only for a cluster of its own."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.dashboard").propagate = False  # its modules set levels of their own, and chat
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def join(address: str) -> None:
    """Connects to the cluster at `auto` or HOST:PORT.

    Raises `InfrastructureError` where it cannot be joined. Ray itself waits two minutes where none answers, so a child
    tries first.
    """
    use_token()
    import ray

    why = _refusal(address)
    if why is None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    raise InfrastructureError(
        f"cannot join the Ray cluster at {address}: {why}; is it up, and does RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
        "name its token? Without an address one is started on this machine"
    )


def _refusal(address: str) -> str | None:
    """Why the cluster at an address cannot be joined; None where it can."""
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=5).close()
        attempt = [sys.executable, "-c", f"import ray; ray.init(address={address!r}, log_to_driver=False)"]
        subprocess.run(attempt, timeout=CONNECT_S, check=True, capture_output=True, text=True)
    except OSError as error:
        return error.strerror or str(error)
    except subprocess.TimeoutExpired:
        return f"no answer within {CONNECT_S} s"
    except subprocess.CalledProcessError as error:
        return next((line for line in reversed(error.stderr.splitlines()) if line.strip()), "it refused")
    return None
