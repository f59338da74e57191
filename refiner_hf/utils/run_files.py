"""Names in the folder of a training run that several jobs know."""

RUN_FILE = "training_arguments.json"  # the options that the run began with
EMA_FOLDER = "ema"  # the averaged weights, within a checkpoint and within the finished folder
EMISSIONS_FILE = "emissions.csv"  # of codecarbon
AUTO_RECIPE = "recipe.yaml"  # what `auto` has chosen, with the options that were given
