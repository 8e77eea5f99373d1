"""PID 1 of a device's container: `python -m flowerbed.device -- ARGUMENTS OF flower-supernode`."""

from flowerbed.device.supervisor import main

main()
