"""Work on blocks whose process is killed, as workers find it by the name of its module."""

from process_tasks import end_once
from s2q.run.work import BlockWork


class KilledOnce(BlockWork):
    """Kills its process, the first time, after it computed the first block and before it saves that.

    A file beside the run folder marks that it did.
    """

    def __call__(self, place, worker):
        runner, marker = self.runner(worker), self.folder.with_name("killed")
        save = runner.folder.save

        def save_unless_killed(*arguments):
            end_once((marker if place[1] == 0 else None, place), worker)
            save(*arguments)

        runner.folder.save = save_unless_killed
        return super().__call__(place, worker)
