"""Who may call an endpoint: whose key a request has, and whether that key may make another request now."""

from graphgen.gateway.errors import ApiError
from graphgen.gateway.http import Scope
from graphgen.gateway.keys import ApiKeys, Holder
from graphgen.gateway.rates import RateLimits


class Admission:
    """Asks for keys."""

    def __init__(self, keys: ApiKeys, rates: RateLimits) -> None:
        self._keys = keys
        self._rates = rates

    def admit(self, scope: Scope) -> Holder:
        """Raises ApiError for a request without a key that is let in, and for one too many."""
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = headers.get(b"x-api-key", b"")
        holder = self._keys.find(key.decode("latin-1").strip())
        if holder is None:
            text = "no API key of this server: send it as `authorization: Bearer KEY`"
            raise ApiError(401, text, "invalid_api_key", headers=[(b"www-authenticate", b"Bearer")])
        # Lists of models and scrapes of metrics cost nothing.
        if holder.requests_per_minute is not None and scope["method"] == "POST":
            wait_s = self._rates.take(holder.name, holder.requests_per_minute)
            if wait_s:
                text = f"this key may make {holder.requests_per_minute} requests a minute: try again in {wait_s:.1f} s"
                raise ApiError(429, text, "rate_limit_exceeded", retry_after_s=wait_s)
        return holder
