# SPDX-License-Identifier: Apache-2.0
"""What runs on a Spark: standard library only, Python 3.10 or newer.

Ansible's modules import it from here; `sparkfleet.host_program` packs it into one file for the services on the host.
"""
