from sdxl_trainer.cli import main

main()
