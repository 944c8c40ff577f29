"""`rankup export`: an adapter or a merged model to share."""
