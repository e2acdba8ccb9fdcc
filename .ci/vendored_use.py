# SPDX-License-Identifier: 0BSD
"""A user's code, checked against a vendored copy: each line marked `ignore` must be an error."""

# pyright: reportUnnecessaryTypeIgnoreComment=error

from app._vendor.dub import Customer, Dub, GetCustomerRequest


def link_of(client: Dub) -> str:
    customer: Customer = client.customers.get(request={"id": "cus_1"})
    client.customers.get(request=GetCustomerRequest(id="cus_1", include_expanded_fields=True))
    client.customers.get("cus_1", include_expanded_fields=True, timeout_ms=5.5, max_retries=0)
    client.customers.get(request={"ID": "cus_1"})  # type: ignore
    client.customers.get(5)  # type: ignore
    print(customer.link.short_link)  # type: ignore
    return customer.link.short_link if customer.link is not None else ""
