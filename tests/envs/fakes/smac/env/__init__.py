from smac.env.starcraft2.starcraft2 import StarCraft2Env as StarCraft2Env
